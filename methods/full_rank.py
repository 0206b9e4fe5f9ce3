"""
Full rank: every weight in floats, torch's AdamW, or 8-bit Adam stepped in backward.
"""

from methods.registry import InBackward, Method
from model import plain_linear


class AdamW(Method):
    linear = plain_linear


class Adam8bit(InBackward):
    linear = plain_linear


# 32: float32 weights under autocast, where dtype is bfloat16
AdamW("adamw", "full rank: torch's AdamW", weight_bits=(32, 16))
Adam8bit("adam8bit", "full rank: bitsandbytes' 8-bit Adam, stepped in backward", weight_bits=(16,),
         fixes={"moments": "8bit"})
