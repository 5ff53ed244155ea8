"""Training a supernet and its gate. The service never imports this."""
