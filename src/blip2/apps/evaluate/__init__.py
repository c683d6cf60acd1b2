"""`blip2 evaluate`: captioning, VQA, retrieval and instructed generation, with every setting that moves the number."""
