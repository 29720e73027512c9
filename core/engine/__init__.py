"""The event-driven engine: queues, KV ledger, plan validation, drivers."""
