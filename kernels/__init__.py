"""
What is written for speed or for memory, below model.py and qgalore.py.

    launch.py       how a CUDA tensor comes from a function of quant.py to its kernel: begin here
    quantized.py    Triton: quantise, dequantise, step INT8 weights
    matmul.py       products with INT8 weights by INT8 codes, products.py the same in Triton
    moments.py      Adam's moments in 1 to 8 bytes an element, and its step; adam.py: in Triton
    sums.py         sums of micro-batches in 1 to 4 bytes an element
    subspace.py     bases of a gradient, and how alike two of them are
    attention.py    RoPE, masks, softmax(q k^T) v
    lean.py         layers that keep less for backward than autograd would
    loss.py         the head and its loss by chunks; rows.py: Triton, for loss, norms and RoPE
    random.py       random numbers from a counter; nf4.py: QLoRA's 4 bits, by bitsandbytes

A kernel has the name, the arguments and the result of a plain function, and is tested against it by
tests/test_kernels.py: on a GPU, or else in Triton's interpreter.
"""
