"""``servelab devices``: the devices of the catalog, and a profile of the machine one is on."""
