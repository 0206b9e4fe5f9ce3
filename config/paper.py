# After a recipe, the paper's optimizer as it is: python train.py config/llama_60m.py config/paper.py
# What then still differs: the similarity is of subspaces, not of first vectors; scales have a float zero point; a step's
# basis comes from the step before.
method = "qgalore"
moments = "8bit"
proj_svd = True
