//! A JSON value as what it is: an object is no list, and the name of a choice is a text.
//!
//! Derived readers also take the fields of an object as a list in the order of the source, and a choice as an object with one field. No
//! agent writes that on purpose, and the order would become a part of the API.

use serde::de::value::{MapDeserializer, SeqDeserializer};
use serde::de::{Deserializer, Error as _, IntoDeserializer, Unexpected, Visitor};
use serde::forward_to_deserialize_any;
use serde_json::{Error, Value};

/// Reads a value by the kind it has.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Strict<'v>(pub(crate) &'v Value);

impl Strict<'_> {
    /// The error that says of which kind it is.
    fn unexpected<'de>(self, expected: &impl Visitor<'de>) -> Error {
        let kind = match self.0 {
            Value::Null => Unexpected::Unit,
            Value::Bool(on) => Unexpected::Bool(*on),
            Value::Number(_) => Unexpected::Other("number"),
            Value::String(text) => Unexpected::Str(text),
            Value::Array(_) => Unexpected::Seq,
            Value::Object(_) => Unexpected::Map,
        };
        Error::invalid_type(kind, expected)
    }
}

impl<'v> IntoDeserializer<'v, Error> for Strict<'v> {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

impl<'de> Deserializer<'de> for Strict<'de> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.0 {
            Value::Array(items) => {
                let mut list = SeqDeserializer::new(items.iter().map(Strict));
                let value = visitor.visit_seq(&mut list)?;
                list.end()?;
                Ok(value)
            }
            Value::Object(fields) => {
                let mut map = MapDeserializer::new(fields.iter().map(|(name, value)| (name.as_str(), Strict(value))));
                let value = visitor.visit_map(&mut map)?;
                map.end()?;
                Ok(value)
            }
            simple => simple.deserialize_any(visitor),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.0 {
            Value::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        match self.0 {
            Value::Array(_) => Err(self.unexpected(&visitor)),
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        match self.0 {
            Value::String(name) => visitor.visit_enum(name.as_str().into_deserializer()),
            _ => Err(self.unexpected(&visitor)),
        }
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple tuple_struct map
        identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::{ReadError, VmConfig, read_object};

    #[test]
    fn objects_are_not_lists_and_choices_are_texts() {
        for (body, field) in [
            (json!({ "cpus": [] }), "cpus"),
            (json!({ "cpus": [4, 8] }), "cpus"),
            (json!({ "disks": [["disk.img"]] }), "disks[0]"),
            (json!({ "serial": { "mode": { "Pty": null } } }), "serial.mode"),
            (json!({ "serial": { "mode": 3 } }), "serial.mode"),
            (json!({ "payload": "vmlinuz" }), "payload"),
            (json!({ "memory": { "size": "1G" } }), "memory.size"),
            (json!({ "memory": { "size": 1.5 } }), "memory.size"),
        ] {
            match read_object::<VmConfig>(body.to_string().as_bytes()) {
                Err(ReadError::Field { path, .. }) => assert_eq!(path, field, "{body}"),
                other => panic!("{body}: {other:?}"),
            }
        }
    }
}
