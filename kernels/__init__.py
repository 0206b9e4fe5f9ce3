"""
What is written for speed or for memory. quant.py and model.py call it; nothing here calls them.

    launch.py       how a CUDA tensor comes from a function of quant.py to its kernel: begin here
    quantized.py    Triton: dequantise, step INT8 weights, step INT8 moments
    products.py     Triton: matrix products of 8-bit numbers
    nf4.py          QLoRA's 4 bits, by bitsandbytes
    lean.py         layers that keep less for backward than autograd would, in plain torch

A kernel has the name, the arguments and the result of the plain function in quant.py, and is tested
against it by tests/test_kernels.py: on a GPU, or else in Triton's interpreter.
"""
