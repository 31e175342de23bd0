//! The decoder of a worker, which goes on after the kernel has dropped descriptors.

use std::os::fd::OwnedFd;

use bytes::BytesMut;
use nix::sys::socket::getsockopt;

use super::{
    MAX_OFFER_FDS, NewLink, Offer, ToWorker, WorkerCodec,
    codec::{frames, not_a_message},
};
use crate::{
    Error, Fds, Frame, Limits,
    codec::{Codec, Decoder, FdQueue},
    sys,
};

/// A decoder of a dispatcher's messages that goes on after the kernel has dropped descriptors on
/// receipt, unlike [`WorkerCodec`]. An offer or a new link without its descriptors is `None`. The
/// connection itself is intact, because the dispatcher has a copy.
///
/// OFFER and MOVE contain the cookie of their first descriptor, by which their descriptors are
/// recognized. The cookie also shows if descriptors belong to another message for any other reason.
#[derive(Debug)]
pub(in crate::handoff) struct SalvagingCodec<F = OwnedFd> {
    /// Returns the `SO_COOKIE` of a socket.
    cookie: fn(&F) -> Option<u64>,
    /// Descriptors were lost. From then on, those of later messages may be missing too, because
    /// descriptors can arrive before their messages. Only a part of a bundle may be there.
    has_lost: bool,
}

impl Default for SalvagingCodec {
    fn default() -> Self {
        Self { cookie: |fd| getsockopt(fd, sys::Cookie).ok(), has_lost: false }
    }
}

impl<F> Codec for SalvagingCodec<F> {
    fn limits(&self) -> Limits {
        WorkerCodec::default().limits()
    }
}

impl<F> Decoder<F> for SalvagingCodec<F> {
    type Item = ToWorker<Option<Offer<F>>, Option<NewLink<F>>>;
    type Error = Error;

    fn decode(
        &mut self,
        src: &mut BytesMut,
        fds: &mut FdQueue<F>,
    ) -> Result<Option<Self::Item>, Error> {
        loop {
            // Decode the message with stand-ins for its descriptors, because those may be missing.
            let mut stand_ins = FdQueue::from_iter([(); MAX_OFFER_FDS]);
            let Some(Frame { payload, fds: claimed }) = frames().decode(src, &mut stand_ins)?
            else {
                break;
            };
            match ToWorker::read(&payload, claimed) {
                Ok(None) => {} // an extension that is not known here
                Ok(Some(ToWorker::Offer { number, offer })) => {
                    let offer = self.claim_offer(offer, fds)?;
                    return Ok(Some(ToWorker::Offer { number, offer }));
                }
                Ok(Some(ToWorker::Move(NewLink { cookie, .. }))) => {
                    let socket = self.claim(cookie, 1, fds)?.and_then(|fds| fds.into_iter().next());
                    let link = socket.map(|socket| NewLink { cookie, socket });
                    return Ok(Some(ToWorker::Move(link)));
                }
                Ok(Some(message)) => return Ok(Some(message.map_both(|_| None, |_| None))),
                Err(_) => return Err(not_a_message()),
            }
        }
        // The loss is noted, so the queue may go on.
        if fds.is_truncated() {
            self.has_lost = true;
            fds.make_good();
        }
        Ok(None)
    }

    fn missing_bytes(&self, src: &BytesMut) -> Option<usize> {
        Decoder::<F>::missing_bytes(&frames(), src)
    }
}

impl<F> SalvagingCodec<F> {
    /// Adds the descriptors to an offer. Returns `None` if they are lost.
    fn claim_offer(
        &mut self,
        offer: Offer<()>,
        fds: &mut FdQueue<F>,
    ) -> Result<Option<Offer<F>>, Error> {
        let Offer { cookie, transport, peer, local, prefix, metadata, bundle, .. } = offer;
        let Some(claimed) = self.claim(cookie, 1 + bundle.len(), fds)? else { return Ok(None) };
        let mut claimed = claimed.into_iter();
        let Some(fd) = claimed.next() else { return Ok(None) }; // never, as one was claimed
        let bundle = claimed.collect();
        Ok(Some(Offer { cookie, transport, peer, local, prefix, metadata, fd, bundle }))
    }

    /// Takes the descriptors of a message, the first of which has this cookie. Returns `None` if
    /// they are lost.
    ///
    /// # Errors
    /// Returns an error if nothing was lost and the first descriptor has another cookie.
    fn claim(
        &mut self,
        cookie: u64,
        count: usize,
        fds: &mut FdQueue<F>,
    ) -> Result<Option<Fds<F>>, Error> {
        let is_it = |fd: &F| (self.cookie)(fd) == Some(cookie);
        self.has_lost |= fds.is_truncated();
        if self.has_lost && !(fds.skip_to(is_it) && fds.count() >= count) {
            return Ok(None);
        }
        let claimed: Fds<F> = fds.claim(count)?;
        if !self.has_lost && !claimed.first().is_some_and(is_it) {
            return Err(Error::invalid(
                "the descriptor of a message does not have the cookie in the message",
            ));
        }
        Ok(Some(claimed))
    }
}

#[cfg(test)]
mod tests {
    use bytes::BufMut;
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::{
        codec::{Inbound, Step},
        handoff::{Address, Transport},
    };

    /// One `recvmsg`.
    #[derive(Debug, Clone)]
    struct Receive {
        /// The share of the remaining bytes.
        bytes: f64,
        /// The number of descriptors that arrive before their offers.
        ahead: usize,
        /// The number of descriptors that the kernel drops.
        lost: usize,
    }

    fn receive() -> impl Strategy<Value = Receive> {
        let lost = prop_oneof![3 => Just(0), 1 => 1..6_usize];
        (0.0..1.0, 0..4_usize, lost).prop_map(|(bytes, ahead, lost)| Receive { bytes, ahead, lost })
    }

    /// Offers with these numbers of descriptors, which are numbered from 0 on and are their own
    /// cookies: the bytes, and where each offer ends among the bytes and among the descriptors.
    fn stream(counts: &[usize]) -> (Vec<u8>, Vec<(usize, usize)>) {
        let (mut bytes, mut ends, mut fds) = (Vec::new(), Vec::new(), 0);
        for (number, count) in counts.iter().enumerate() {
            let offer = Offer {
                cookie: fds as u64,
                transport: Transport::Tcp,
                peer: Address::Unnamed,
                local: Address::Unnamed,
                prefix: "GET / HTTP/1.1".into(),
                metadata: Default::default(),
                fd: (),
                bundle: vec![(); count - 1],
            };
            let payload = ToWorker::Offer { number: number as u64, offer }.to_payload().unwrap();
            bytes.put_slice(&[0xFD, 0x10]);
            bytes.put_u16(*count as u16);
            bytes.put_u32(payload.len() as u32);
            bytes.put_slice(&payload);
            fds += count;
            ends.push((bytes.len(), fds));
        }
        (bytes, ends)
    }

    proptest! {
        /// Whatever is lost, each offer has its own descriptors or none, and the loss is over with
        /// the `recvmsg` that had it.
        #[test]
        fn a_loss_takes_only_the_offers_that_it_is_about(
            counts in vec(1..4_usize, 1..20),
            receives in vec(receive(), 0..12),
        ) {
            let (bytes, ends) = stream(&counts);
            let mut codec = SalvagingCodec { cookie: |fd: &u64| Some(*fd), has_lost: false };
            let mut inbound = Inbound::new(false, BytesMut::new(), FdQueue::new());
            let (mut position, mut sent, mut offers) = (0, 0, Vec::new());
            let mut safe_from = 0; // descriptors from here on were sent after the last loss

            // One `recvmsg` after the other. The last one returns everything that is left.
            let last = Receive { bytes: 1.0, ahead: 0, lost: 0 };
            for Receive { bytes: share, ahead, lost } in receives.into_iter().chain([last]) {
                let end = position + ((bytes.len() - position) as f64 * share).ceil() as usize;
                let complete = ends.iter().take_while(|(bytes, _)| *bytes <= end).last();
                let complete = complete.map_or(0, |(_, fds)| *fds);
                let total = ends.last().map_or(0, |(_, fds)| *fds);
                let now = sent.max((complete + ahead).min(total));
                let lost = lost.min(now - sent);
                inbound.bytes.put_slice(&bytes[position..end]);
                inbound.fds.extend((sent..now - lost).map(|fd| fd as u64));
                (position, sent) = (end, now);
                if lost > 0 {
                    inbound.received_truncated();
                    safe_from = now;
                } else {
                    inbound.received();
                }

                // Decode all messages that are complete.
                loop {
                    match inbound.next(&mut codec) {
                        Ok(Step::Item(ToWorker::Offer { number, offer })) => {
                            offers.push((number, offer));
                        }
                        Ok(Step::Receive) => break,
                        other => prop_assert!(false, "{other:?}"),
                    }
                }
            }

            // Each offer has its own descriptors, or a loss was before its last one.
            prop_assert_eq!(offers.len(), counts.len());
            for (at, (number, offer)) in offers.into_iter().enumerate() {
                let (first, next) = (ends[at].1 - counts[at], ends[at].1);
                prop_assert_eq!(number, at as u64);
                match offer {
                    Some(offer) => prop_assert!(offer.into_fds().eq(first as u64..next as u64)),
                    None => prop_assert!(first < safe_from, "offer {} has lost nothing", at),
                }
            }
        }
    }

    #[test]
    fn without_a_loss_a_descriptor_of_another_offer_is_an_error() {
        let (bytes, _) = stream(&[1]);
        let mut codec = SalvagingCodec { cookie: |fd: &u64| Some(*fd), has_lost: false };
        let mut fds = FdQueue::from_iter([7]);
        assert!(codec.decode(&mut BytesMut::from(&bytes[..]), &mut fds).is_err());
    }
}
