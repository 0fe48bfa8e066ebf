"""What is known of songs: text beside them, dataset.json, training tensors and batches of them."""
