"""The model science of TinyEmo: taxonomies, label embeddings, projector, losses and metrics.

Imports torch and transformers; never ray, deepspeed, mlflow or boto3.
"""
