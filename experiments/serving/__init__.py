"""A small server with the OpenAI interface, for exports and packages that vLLM does not take."""
