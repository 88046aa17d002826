"""Dynamic patterns: one file for each published method, named as the pattern is written.

The folders say what decides: ``top_k`` keeps a number or share of the blocks, ``top_p`` those that
hold a share of the attention mass; ``approximations`` replace keys that are not kept by a few means;
``per_head_blocks`` sort or cluster the tokens of each head first; ``across_steps`` carry choices from
one denoising step to the next.
"""
