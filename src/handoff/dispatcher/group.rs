//! The name of a group of workers.

use std::{fmt, sync::Arc};

/// The name of a group of workers, from a string. Each worker and each connection belongs to one
/// group, and a connection goes to the workers of its group only. The default group has the empty
/// name.
///
/// ```
/// use fdwire::handoff::Group;
///
/// let group = Group::from("tenant-7");
/// assert_eq!(group.as_str(), "tenant-7");
/// assert_eq!(Group::default(), Group::from(""));
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Group(Option<Arc<str>>);

impl Group {
    /// Returns the name.
    pub fn as_str(&self) -> &str {
        self.0.as_deref().unwrap_or_default()
    }
}

impl From<&str> for Group {
    fn from(name: &str) -> Self {
        Self((!name.is_empty()).then(|| name.into()))
    }
}

impl From<String> for Group {
    fn from(name: String) -> Self {
        name.as_str().into()
    }
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
