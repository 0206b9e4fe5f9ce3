"""
How a model is evaluated, below evaluate.py.

    questions.py     what is asked: records with a prompt each, or MMLU's files
    items.py         questions and texts as rows of tokens, which the model computes
    scores.py        what the model says of rows: log-likelihoods, or the likeliest text
    results.py       the file of results so far, with which a run goes on where it stopped
    figures.py       what the results amount to
"""
