"""What lies in S3: versioned manifests, shards, validation of rows, splits."""
