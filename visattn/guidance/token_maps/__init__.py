"""Maps of the attention to words of the prompt, and what is done with them."""
