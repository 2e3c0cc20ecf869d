//! What the network may throw at a gateway: each costs its sender a status or the connection, and nobody else anything.
