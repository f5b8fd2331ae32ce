"""What the platform fetches: data sets, LLMs and encoders, from a mirror or their public source."""
