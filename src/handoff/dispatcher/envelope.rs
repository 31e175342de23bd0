use bytes::Bytes;

use crate::{
    fields::{Fields, put_short},
    handoff::Group,
};

/// The metadata of an offer to another dispatcher. It has the application's metadata, and the facts
/// that an offer to a worker does not have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Envelope {
    pub(super) key: Option<u64>,
    pub(super) group: Group,
    pub(super) metadata: Bytes,
}

impl Envelope {
    pub(super) fn encode(&self) -> Bytes {
        let mut bytes = Vec::with_capacity(16 + self.metadata.len());
        bytes.push(self.key.is_some().into());
        bytes.extend(self.key.unwrap_or_default().to_be_bytes());
        let fits = put_short(&mut bytes, self.group.as_str().as_bytes());
        debug_assert!(fits.is_ok(), "a name is checked when its group is made");
        bytes.extend_from_slice(&self.metadata);
        bytes.into()
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut fields = Fields(bytes);
        let (has_key, key) = (fields.bool()?, fields.u64()?);
        let group = Group::from(fields.text()?);
        let metadata = Bytes::copy_from_slice(fields.rest());
        Some(Self { key: has_key.then_some(key), group, metadata })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_keeps_its_key_group_and_metadata() {
        for key in [None, Some(u64::MAX)] {
            let envelope = Envelope { key, group: "images".into(), metadata: "tenant 7".into() };
            assert_eq!(Envelope::decode(&envelope.encode()), Some(envelope));
        }
        assert_eq!(Envelope::decode(b"\0"), None);
    }
}
