"""What answers: finding a model, generating tokens, talking. Nothing here knows that training exists."""
