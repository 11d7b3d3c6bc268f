"""Few-shot tasks, scored with the memory: items, prompts, scores, statistics."""
