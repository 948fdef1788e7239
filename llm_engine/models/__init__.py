"""DeepSeek V3.2 and V3 in plain torch: shapes, weights and the forward pass. Calls only the kernel table."""
