"""The engine ``openai``: any server that speaks the chat completions of the OpenAI API."""
