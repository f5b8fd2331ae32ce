"""Data sets in S3: what they hold, how they are made, and how a run reads them."""
