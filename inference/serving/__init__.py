"""Models behind the OpenAI chat-completions protocol, with a chat page."""
