"""The reasoning model: vision tower, connector and causal language model, as one Hugging Face model.

An image becomes P embeddings of the language model's width H, which stand where the prompt's placeholders do.
TinyEmo (arXiv 2410.07062) took this form from TinyLLaVA Factory.
"""
