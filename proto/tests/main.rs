//! The wire as a whole: the schema, SPEC.md and the golden vectors against the code.

#[path = "main/generate.rs"]
mod generate;
#[path = "main/schema.rs"]
mod schema;
#[path = "main/spec.rs"]
mod spec;
#[path = "main/types.rs"]
mod types;
#[path = "main/vectors.rs"]
mod vectors;
#[path = "main/wire.rs"]
mod wire;
