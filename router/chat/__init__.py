"""Chat formats: messages become a prompt; completion text becomes reasoning, content and tool calls."""
