/// The settings of an [`Incoming`](super::Incoming), which its builder documents.
#[derive(Debug, Clone, Copy)]
pub(super) struct Settings {
    pub(super) window: u64,
    pub(super) max_connections: u64,
    pub(super) serve_unanswered: bool,
    pub(super) max_fds: u8,
}

impl Default for Settings {
    fn default() -> Self {
        Self { window: 64, max_connections: u64::MAX, serve_unanswered: false, max_fds: 1 }
    }
}
