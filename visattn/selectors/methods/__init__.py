"""Dynamic patterns: one file for each published method, named as the pattern is written.

The folders sort the methods by what decides which keys a query sees:

- ``top_k``: a number of blocks, or a share of them, with the highest scores.
- ``top_p``: the fewest blocks that hold a share of the attention mass.
- ``approximations``: keys that are not kept are approximated, by means or low rank.
- ``per_head_blocks``: the tokens of each head are sorted, hashed or clustered into blocks first.
- ``across_steps``: choices are carried from one denoising step to the next.
"""
