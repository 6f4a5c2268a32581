"""What a multimodal LLM is: parts, fusion, adapters, files."""
