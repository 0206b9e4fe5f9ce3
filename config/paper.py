# After a recipe, the paper's optimizer to the letter:
#   python train.py config/llama_7b.py config/paper.py
# What then still differs: the similarity is of subspaces, not of first vectors; scales have a float
# zero point; a step's basis comes from the step before, the first one from a micro-batch.
method = "qgalore"
moments = "8bit"
weight_group_size = 256
matmul = "float"
proj_svd = True
