"""Rollouts from SGLang servers: client, launched servers, and the fleet that is an `Engine`."""
