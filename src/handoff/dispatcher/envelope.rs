use bytes::Bytes;

use crate::{
    fields::{Fields, put_long},
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
        let fits = put_long(&mut bytes, &self.metadata);
        debug_assert!(fits.is_ok(), "`Handover::prepare` has checked that it fits one message");
        bytes.extend_from_slice(self.group.as_str().as_bytes());
        bytes.into()
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut fields = Fields(bytes);
        let (has_key, key) = (fields.bool()?, fields.u64()?);
        let metadata = Bytes::copy_from_slice(fields.long()?);
        let group = Group::from(str::from_utf8(fields.rest()).ok()?);
        Some(Self { key: has_key.then_some(key), group, metadata })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_keeps_its_key_group_and_metadata() {
        let long_name = "x".repeat(70_000);
        for (key, group) in [(None, "images"), (Some(u64::MAX), ""), (Some(0), &long_name)] {
            let envelope = Envelope { key, group: group.into(), metadata: "tenant 7".into() };
            assert_eq!(Envelope::decode(&envelope.encode()), Some(envelope));
        }
        assert_eq!(Envelope::decode(b"\0"), None);
    }
}
