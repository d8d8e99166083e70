//! The API as an OpenAPI 3.1 document, made from the routes, the phases and the types themselves.
//!
//! It describes what this build serves, the routes it lacks included (they answer 501), so that clients can be generated from it and
//! tests can hold the server to it.

mod examples;
mod operations;

use schemars::generate::SchemaSettings;
use schemars::transform::RecursiveTransform;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde_json::{Map, Value, json};

use crate::server::ROUTES;
use operations::Contract;

/// The whole document.
pub fn document() -> Value {
    let mut generator = generator();
    let mut paths = Map::new();
    for route in ROUTES {
        let contract = Contract::of(route, &mut generator);
        paths.insert(format!("/{}", route.name), contract.path_item(route));
    }
    let error = reference::<Error>(&mut generator);
    let mut schemas = generator.take_definitions(true);
    schemas.values_mut().for_each(shorten);
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Triarch",
            "version": env!("CARGO_PKG_VERSION"),
            "summary": "One virtual machine, driven over a unix socket.",
            "description": DESCRIPTION,
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
        },
        "jsonSchemaDialect": "https://json-schema.org/draft/2020-12/schema",
        "servers": [{
            "url": "http://localhost/api/v1",
            "description": "The host is ignored: connect to the unix socket that --api-socket names.",
        }],
        "paths": paths,
        "components": { "responses": operations::errors(&error), "schemas": schemas },
    })
}

/// The document as it is checked in.
pub fn text() -> String {
    // Values of our own always serialise.
    let mut text = serde_json::to_string_pretty(&document()).unwrap_or_default();
    text.push('\n');
    text
}

const DESCRIPTION: &str = "Names and fields are those of Cloud Hypervisor's API, versions 51 to 53. Fields that are not listed are \
ignored, unless they ask for a device or a protection that this version does not have: those are answered with 501. Enumerations are \
CamelCase, sizes are bytes. A path called with another method than its own answers 405. A connection serves one request after the \
other; bodies have a Content-Length. Descriptors come with the bytes of a request (SCM_RIGHTS).";

/// Body of every answer that is not a success.
#[derive(JsonSchema)]
#[expect(dead_code, reason = "only its schema is used")]
struct Error {
    /// One sentence, which names the field and the cause.
    error: String,
}

/// Schemas of what is sent to the server, with references that OpenAPI resolves.
fn generator() -> SchemaGenerator {
    let mut settings = SchemaSettings::draft2020_12();
    settings.definitions_path = "/components/schemas".into();
    settings.meta_schema = None;
    settings.transforms.push(Box::new(RecursiveTransform(limits)));
    settings.into_generator()
}

/// A reference to the schema of `T`, which is generated if it is not yet.
fn reference<T: JsonSchema>(generator: &mut SchemaGenerator) -> Value {
    generator.subschema_for::<T>().into()
}

/// Numbers that no Rust integer of the field's type can hold are refused by the reader, so the schema says so.
fn limits(schema: &mut Schema) {
    let greatest = match schema.get("format").and_then(Value::as_str) {
        Some("uint32") => u64::from(u32::MAX),
        Some("uint64") => u64::MAX,
        _ => return,
    };
    if schema.get("maximum").is_none() {
        schema.insert("maximum".to_owned(), greatest.into());
    }
}

/// Comments are wrapped where the source is; text is not.
fn shorten(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            if let Some(Value::String(text)) = fields.get_mut("description") {
                *text = text.replace('\n', " ");
            }
            fields.values_mut().for_each(shorten);
        }
        Value::Array(items) => items.iter_mut().for_each(shorten),
        _ => {}
    }
}

#[cfg(test)]
mod tests;
