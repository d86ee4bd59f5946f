"""The methods of Table 1 under one contract: each is configured, fitted and asked for the choices' log-likelihoods."""
