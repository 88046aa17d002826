"""One attention call of a layer with a plan: what its heads run, also with an edit or with padding
of the text."""
