"""Measurements of any Hugging Face model beside its teacher: perplexity, retrieval, questions and their report."""
