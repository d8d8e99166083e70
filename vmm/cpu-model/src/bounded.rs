//! Lists and maps that a stranger wrote: read without ever holding more than they may have.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};

/// Reads a list of at most `MAX` members.
pub(crate) fn list<'de, D, T, const MAX: usize>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    struct List<T, const MAX: usize>(PhantomData<T>);

    impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for List<T, MAX> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "a list of at most {MAX}")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut members: A) -> Result<Self::Value, A::Error> {
            let mut list = Vec::new();
            while let Some(member) = members.next_element()? {
                if list.len() == MAX {
                    return Err(A::Error::custom(format_args!("more than {MAX} entries")));
                }
                list.push(member);
            }
            Ok(list)
        }
    }

    deserializer.deserialize_seq(List::<T, MAX>(PhantomData))
}

/// Reads a map of at most `MAX` numbers.
pub(crate) fn map<'de, D, const MAX: usize>(deserializer: D) -> Result<BTreeMap<u32, u64>, D::Error>
where
    D: Deserializer<'de>,
{
    struct Map<const MAX: usize>;

    impl<'de, const MAX: usize> Visitor<'de> for Map<MAX> {
        type Value = BTreeMap<u32, u64>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "a map of at most {MAX} numbers")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Self::Value, A::Error> {
            let mut map = BTreeMap::new();
            while let Some((key, value)) = members.next_entry()? {
                map.insert(key, value);
                if map.len() > MAX {
                    return Err(A::Error::custom(format_args!("more than {MAX} entries")));
                }
            }
            Ok(map)
        }
    }

    deserializer.deserialize_map(Map::<MAX>)
}
