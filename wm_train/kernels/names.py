"""Name the engines that a configuration may choose, without torch, so that checks need not import
it."""

ENGINES = ("auto", "triton", "reference")  # of the GDN kernels, key backend.kernels
ATTENTION = (  # of the softmax blocks, key backend.attention
    "auto",
    "cudnn",
    "flash",
    "flash_attn",
    "flash_attn_3",
    "npu_fusion",
    "flex",
    "plain",
)
