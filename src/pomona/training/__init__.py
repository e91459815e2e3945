"""The only training loop: clients and retraining alike."""
