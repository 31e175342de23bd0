use tracing::{Event, Level, Metadata, Subscriber, span};

/// A subscriber that calls a function with each event of one level, and ignores spans.
pub(crate) struct Events<F>(pub(crate) Level, pub(crate) F);

impl<F: Fn(&Event<'_>) + 'static> Subscriber for Events<F>
where
    Self: Send + Sync,
{
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == self.0
    }
    fn event(&self, event: &Event<'_>) {
        (self.1)(event);
    }
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}
