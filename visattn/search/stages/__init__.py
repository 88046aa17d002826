"""The five stages of a search, each a function from frozen results to a frozen result."""
