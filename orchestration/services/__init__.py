"""The only modules that talk to outside services: S3, MLflow, DeepSpeed and the Ray cluster."""
