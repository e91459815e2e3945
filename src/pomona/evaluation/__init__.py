"""Perplexity, answers, ROUGE-L, expert load, intervals."""
