//! Mooncake's NIC priority matrix: which network devices are near which memory.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::marker::PhantomData;

use serde::de::{DeserializeOwned, Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use crate::error::{Code, Error, Result};

/// Most bytes of a matrix as JSON text.
pub const MAX_TEXT: usize = 4 << 20;
/// Most memory locations in a matrix.
pub const MAX_LOCATIONS: usize = 4096;
/// Most NICs in one list of a matrix.
pub const MAX_NICS: usize = 1024;
/// Most bytes of any one name.
pub const MAX_NAME: usize = 4096;

/// The NICs of one memory location, each list in order of preference.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(Nics, Nics)", into = "(Nics, Nics)")]
pub struct Entry {
    /// The nearest ones.
    pub preferred: Vec<String>,
    /// The others that may be used.
    pub available: Vec<String>,
}

/// A NIC priority matrix: an [`Entry`] for each memory location, such as `cpu:0` or `cuda:3`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Topology {
    /// The entries by location.
    pub entries: BTreeMap<String, Entry>,
}

impl Topology {
    /// The matrix for a host of which nothing is known: every NIC is preferred for `cpu:0`.
    pub fn flat(names: &[String]) -> Self {
        let entry = Entry { preferred: names.to_vec(), available: Vec::new() };
        Self { entries: BTreeMap::from([("cpu:0".to_owned(), entry)]) }
    }

    /// Without the NICs that are not among `names`: C++ peers take a NIC's place in a topology for its
    /// place in the descriptor.
    pub fn only(mut self, names: &[String]) -> Self {
        for entry in self.entries.values_mut() {
            entry.preferred.retain(|name| names.contains(name));
            entry.available.retain(|name| names.contains(name));
        }
        self
    }

    /// Reads `{"cpu:0": [[preferred...], [available...]], ...}`.
    pub fn from_json(text: &str) -> Result<Self> {
        let topology: Self = parse("topology", text, MAX_TEXT)?;
        topology.check().map_err(|e| e.context("topology"))?;
        Ok(topology)
    }

    /// Writes what [`Topology::from_json`] reads.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("a map of strings has a JSON form")
    }

    /// The rules that JSON itself does not enforce.
    pub(crate) fn check(&self) -> Result<()> {
        for (location, entry) in &self.entries {
            check_name("location", location)?;
            for name in entry.nics() {
                check_name("NIC", name)
                    .map_err(|e| e.context(format!("location '{}'", printable(location))))?;
            }
        }
        Ok(())
    }

    /// Every NIC once, in the order of the locations' names and, within a location, of preference.
    ///
    /// Mooncake's own list (`getHcaList`) walks a hash table instead, so with several locations its
    /// order may differ, and with it the NIC that its index into a descriptor's devices means.
    pub fn devices(&self) -> Vec<String> {
        let mut devices: Vec<String> = Vec::new();
        for name in self.entries.values().flat_map(Entry::nics) {
            if !devices.contains(name) {
                devices.push(name.clone());
            }
        }
        devices
    }

    /// The NICs for memory at `location`, as indices into `names`: the preferred ones, then the
    /// others that may be used, each in order of preference.
    ///
    /// The first list is empty only where `names` is: a location without a preferred NIC prefers
    /// all that are available, and `*`, a location that the matrix lacks, or one with none of
    /// `names` prefers all of `names`.
    pub fn nics_for(&self, location: &str, names: &[String]) -> (Vec<usize>, Vec<usize>) {
        let mut preferred = Vec::new();
        let mut others = Vec::new();
        if let Some(entry) = self.entries.get(location).filter(|_| location != "*") {
            // A peer may name a thousand NICs a thousand times.
            let indices: HashMap<&str, usize> =
                names.iter().enumerate().rev().map(|(index, name)| (&**name, index)).collect();
            let mut taken = vec![false; names.len()];
            for (list, near) in
                [(&entry.preferred, &mut preferred), (&entry.available, &mut others)]
            {
                for &index in list.iter().filter_map(|name| indices.get(&**name)) {
                    if !std::mem::replace(&mut taken[index], true) {
                        near.push(index);
                    }
                }
            }
        }
        if preferred.is_empty() {
            preferred = std::mem::take(&mut others);
        }
        if preferred.is_empty() {
            preferred = (0..names.len()).collect();
        }
        (preferred, others)
    }
}

impl Entry {
    fn nics(&self) -> impl Iterator<Item = &String> {
        self.preferred.iter().chain(&self.available)
    }
}

/// One list of an entry as JSON has it.
#[derive(Serialize, Deserialize)]
struct Nics(#[serde(deserialize_with = "bounded::<_, _, MAX_NICS>")] Vec<String>);

impl From<(Nics, Nics)> for Entry {
    fn from((preferred, available): (Nics, Nics)) -> Self {
        Self { preferred: preferred.0, available: available.0 }
    }
}

impl From<Entry> for (Nics, Nics) {
    fn from(entry: Entry) -> Self {
        (Nics(entry.preferred), Nics(entry.available))
    }
}

impl<'de> Deserialize<'de> for Topology {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Matrix;
        impl<'de> Visitor<'de> for Matrix {
            type Value = Topology;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a map of [[preferred...], [available...]]")
            }

            // A descriptor of Mooncake's has null for an empty matrix.
            fn visit_unit<E>(self) -> Result<Topology, E> {
                Ok(Topology::default())
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Topology, M::Error> {
                let mut topology = Topology::default();
                while let Some((location, entry)) = map.next_entry()? {
                    if topology.entries.len() == MAX_LOCATIONS {
                        return Err(M::Error::custom(format_args!(
                            "more than {MAX_LOCATIONS} locations"
                        )));
                    }
                    topology.entries.insert(location, entry);
                }
                Ok(topology)
            }
        }
        deserializer.deserialize_any(Matrix)
    }
}

/// Reads a list of at most `MAX` elements. The limit is kept while reading, because a list can take
/// thirty times its text's size in memory.
pub(crate) fn bounded<'de, D, T, const MAX: usize>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    struct List<T, const MAX: usize>(PhantomData<T>);
    impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for List<T, MAX> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
            write!(f, "a list of at most {MAX} elements")
        }

        fn visit_seq<S: SeqAccess<'de>>(self, mut seq: S) -> Result<Vec<T>, S::Error> {
            let mut list = Vec::new();
            while let Some(element) = seq.next_element()? {
                if list.len() == MAX {
                    return Err(S::Error::custom(format_args!("more than {MAX} elements")));
                }
                list.push(element);
            }
            Ok(list)
        }
    }
    deserializer.deserialize_seq(List::<T, MAX>(PhantomData))
}

/// Reads the JSON object `text`, a `what`, of at most `max` bytes.
pub(crate) fn parse<T: DeserializeOwned>(what: &str, text: &str, max: usize) -> Result<T> {
    limit(what, text, max)?;
    // serde would read a struct from a list of its fields, too.
    if !text.trim_start().starts_with('{') {
        return Err(malformed(format!("{what}: not a JSON object")));
    }
    serde_json::from_str(text).map_err(|e| {
        let reason = e.to_string();
        let reason = reason.rsplit_once(" at line ").map_or(&*reason, |(reason, _)| reason);
        let reason = printable(reason);
        malformed(format!("{what}: line {}, column {}: {reason}", e.line(), e.column()))
    })
}

/// Refuses a name that is empty, or that [`line`] refuses. `what` says whose it is.
pub(crate) fn check_name(what: &str, name: &str) -> Result<()> {
    if name.is_empty() {
        return Err(malformed(format!("{what}: empty")));
    }
    line(what, name)
}

/// Refuses `text`, a `what`, if it is too long for a name, or has control characters: names go into
/// errors and logs, which are lines, and to C.
pub(crate) fn line(what: &str, text: &str) -> Result<()> {
    limit(what, text, MAX_NAME)?;
    match text.chars().find(|c| c.is_control()) {
        Some(c) => Err(malformed(format!("{what}: has the control character {c:?}"))),
        None => Ok(()),
    }
}

/// Refuses `text`, a `what`, if it is longer than `max` bytes.
pub(crate) fn limit(what: &str, text: &str, max: usize) -> Result<()> {
    if text.len() > max {
        return Err(malformed(format!("{what}: {} bytes, at most {max} allowed", text.len())));
    }
    Ok(())
}

/// A peer's text in a form that is safe in one line of a log.
pub(crate) fn printable(text: &str) -> String {
    text.chars().take(200).map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// An error of class [`Code::MalformedJson`].
pub(crate) fn malformed(text: String) -> Error {
    Error::new(Code::MalformedJson, text)
}

#[cfg(test)]
mod tests {
    use proptest::collection::{btree_map, vec};
    use proptest::prelude::*;

    use super::*;

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|name| name.to_string()).collect()
    }

    fn entry(preferred: &[&str], available: &[&str]) -> Entry {
        Entry { preferred: names(preferred), available: names(available) }
    }

    const TWO: &str = r#"{"cpu:0":[["a"],["b","c"]],"cuda:0":[["c","b"],["d"]]}"#;

    #[test]
    fn reads_and_writes_mooncakes_form() {
        let topology = Topology::from_json(TWO).unwrap();
        assert_eq!(topology.entries["cpu:0"], entry(&["a"], &["b", "c"]));
        assert_eq!(topology.entries["cuda:0"], entry(&["c", "b"], &["d"]));
        assert_eq!(topology.entries.len(), 2);
        assert_eq!(topology.to_json(), TWO);
    }

    #[test]
    fn flat_prefers_every_nic() {
        let topology = Topology::flat(&names(&["a", "b"]));
        assert_eq!(topology.to_json(), r#"{"cpu:0":[["a","b"],[]]}"#);
    }

    #[test]
    fn refusals_name_what_is_wrong_and_where() {
        let long = "n".repeat(MAX_NAME + 1);
        let many = vec!["\"n\""; MAX_NICS + 1].join(",");
        let locations: Vec<_> =
            (0..=MAX_LOCATIONS).map(|i| format!(r#""cpu:{i}":[[],[]]"#)).collect();
        let table = [
            ("".into(), "not a JSON object"),
            ("null".into(), "not a JSON object"),
            ("[]".into(), "not a JSON object"),
            ("{".into(), "line 1, column 1: EOF"),
            (r#"{"cpu:0":[["a"]]}"#.into(), "line 1, column 16: invalid length 1"),
            (r#"{"cpu:0":[[],[],[]]}"#.into(), "trailing characters"),
            (r#"{"cpu:0":{"preferred":[]}}"#.into(), "invalid type: map"),
            (r#"{"cpu:0":[[1],[]]}"#.into(), "invalid type: integer `1`"),
            (r#"{"cpu:0":null}"#.into(), "invalid type: null"),
            ("{}x".into(), "trailing characters"),
            (r#"{"":[[],[]]}"#.into(), "location: empty"),
            (r#"{"cpu:0":[[],["a",""]]}"#.into(), "location 'cpu:0': NIC: empty"),
            (format!(r#"{{"{long}":[[],[]]}}"#), "location: 4097 bytes, at most 4096"),
            (format!(r#"{{"x":[["{long}"],[]]}}"#), "location 'x': NIC: 4097 bytes, at most 4096"),
            (r#"{"x\n":[[],[]]}"#.into(), "location: has the control character '\\n'"),
            (r#"{"x":[["a\u0000"],[]]}"#.into(), "NIC: has the control character '\\0'"),
            (format!(r#"{{"a":[[{many}],[]]}}"#), "more than 1024 elements"),
            (format!("{{{}}}", locations.join(",")), "more than 4096 locations"),
            (format!("{{{}}}", " ".repeat(MAX_TEXT)), "4194306 bytes, at most 4194304 allowed"),
        ];
        for (text, expected) in table {
            let error = Topology::from_json(&text).unwrap_err();
            assert_eq!(error.code, Code::MalformedJson);
            assert!(error.text.starts_with("topology: "), "{error}");
            assert!(error.text.contains(expected), "{error} lacks {expected}");
            assert!(error.text.len() < 300 && error.text.lines().count() == 1, "{error}");
        }
    }

    #[test]
    fn sizes_at_the_limits_are_read() {
        let nics = vec![format!("\"{}\"", "n".repeat(MAX_NAME)); MAX_NICS / 2].join(",");
        assert!(Topology::from_json(&format!(r#"{{"a":[[{nics}],[]]}}"#)).is_ok());
        let nics = vec!["\"n\""; MAX_NICS].join(",");
        assert!(Topology::from_json(&format!(r#"{{"a":[[{nics}],[{nics}]]}}"#)).is_ok());
    }

    #[test]
    fn an_error_does_not_repeat_a_long_input() {
        for text in ["x".repeat(10_000), "\u{20ac}".repeat(10_000)] {
            let error = Topology::from_json(&format!(r#"{{"a":"{text}"}}"#)).unwrap_err();
            assert!(error.text.chars().count() < 300, "{error}");
        }
    }

    #[test]
    fn devices_are_listed_once_in_order() {
        assert_eq!(Topology::from_json(TWO).unwrap().devices(), ["a", "b", "c", "d"]);
        assert!(Topology::default().devices().is_empty());
    }

    #[test]
    fn nics_for_follows_the_matrix() {
        let topology = Topology::from_json(
            r#"{"*":[["b"],[]],"cpu:0":[["c","a","c"],["b","a","gone","b"]],"cpu:1":[[],["b","a"]],
                "cpu:2":[["gone"],["a"]],"cpu:3":[["gone"],[]],"cpu:4":[["a"],[]]}"#,
        )
        .unwrap();
        let names = names(&["a", "b", "c"]);
        let nics = |location| topology.nics_for(location, &names);
        assert_eq!(nics("cpu:0"), (vec![2, 0], vec![1]));
        assert_eq!(nics("cpu:1"), (vec![1, 0], vec![]), "none preferred: the available are");
        assert_eq!(nics("cpu:2"), (vec![0], vec![]), "the preferred one is not there");
        assert_eq!(nics("cpu:3"), (vec![0, 1, 2], vec![]), "none is there: all are");
        assert_eq!(nics("cpu:4"), (vec![0], vec![]), "what is not listed is not used");
        assert_eq!(nics("cuda:9"), (vec![0, 1, 2], vec![]), "no such location");
        assert_eq!(nics("*"), (vec![0, 1, 2], vec![]), "anywhere");
        assert_eq!(topology.nics_for("cpu:0", &[]), (vec![], vec![]));
    }

    fn any_topology() -> impl Strategy<Value = Topology> {
        let nics = || vec("\\PC{1,8}", 0..4);
        let entry =
            (nics(), nics()).prop_map(|(preferred, available)| Entry { preferred, available });
        btree_map("\\PC{1,8}", entry, 0..4).prop_map(|entries| Topology { entries })
    }

    proptest! {
        #[test]
        fn a_round_trip_changes_nothing(topology in any_topology()) {
            prop_assert_eq!(Topology::from_json(&topology.to_json()).unwrap(), topology);
        }

        #[test]
        fn any_text_is_read_or_refused(text in "\\PC*|[{}\\[\\]\",:a0]*") {
            let _ = Topology::from_json(&text);
            let _ = Topology::from_json(&format!("{{\"a\":{text}}}"));
        }

        #[test]
        fn nics_for_names_each_nic_at_most_once(
            topology in any_topology(), names in vec("\\PC{1,2}", 0..6), location in "\\PC{1,8}",
        ) {
            let locations = topology.entries.keys().chain([&location]);
            for location in locations {
                let (mut all, others) = topology.nics_for(location, &names);
                prop_assert_eq!(all.is_empty(), names.is_empty());
                all.extend(others);
                let count = all.len();
                all.sort_unstable();
                all.dedup();
                prop_assert_eq!(all.len(), count);
                prop_assert!(all.iter().all(|i| *i < names.len()));
            }
        }
    }
}
