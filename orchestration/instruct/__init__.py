"""From LLaVA records and images to a checked instruct data set."""
