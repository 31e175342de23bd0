//! `sendmsg` and `recvmsg` with descriptors.
//!
//! They use libc directly. nix's `recvmsg` makes received descriptors unreachable if the control
//! data was truncated, and its `sendmsg` allocates in each call.

use std::{
    io::{self, IoSlice},
    mem::{self, MaybeUninit},
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::net::SocketAddr,
    },
};

use bytes::{BufMut, BytesMut};
use nix::{
    errno::Errno,
    libc,
    sys::socket::{SockaddrLike, UnixAddr},
};

use super::{address::Name, credentials::from_kernel};
use crate::{credentials::Credentials, limits::SCM_MAX_FD};

/// The type of a control message with a pidfd, which libc 0.2 lacks. It carries one descriptor,
/// installed like any other.
const SCM_PIDFD: libc::c_int = 4;

/// The size of the buffer for control data: 1,032 bytes for 253 descriptors, and the rest for
/// credentials, a pidfd and timestamps. This process or another holder of the socket may have
/// switched these on. They come before or after the descriptors, and must not use up their room.
const CONTROL_BYTES: usize = 1032 + 248;

/// The control data of a call, with the alignment of `cmsghdr`.
#[repr(C)]
union Control {
    header: libc::cmsghdr,
    bytes: [MaybeUninit<u8>; CONTROL_BYTES],
}

impl Control {
    fn new() -> Self {
        Self { bytes: [MaybeUninit::uninit(); CONTROL_BYTES] }
    }

    /// Writes a control message with these descriptors, at most 253. Returns its length, which
    /// includes the padding.
    fn write_fds<'fd>(&mut self, fds: impl ExactSizeIterator<Item = BorrowedFd<'fd>>) -> usize {
        let count = fds.len();
        assert!(count <= SCM_MAX_FD, "the room for control data ends here");
        let payload_bytes = (count * size_of::<RawFd>()) as libc::c_uint;
        // SAFETY: only computes a size.
        let length = unsafe { libc::CMSG_LEN(payload_bytes) };
        let header = libc::cmsghdr {
            cmsg_len: length as _,
            cmsg_level: libc::SOL_SOCKET,
            cmsg_type: libc::SCM_RIGHTS,
        };
        self.header = header;
        // SAFETY: the pointer is to the header just written.
        let data = unsafe { libc::CMSG_DATA((&raw mut *self).cast::<libc::cmsghdr>()) };
        // Write one number more: for an odd number of descriptors, the kernel also reads the
        // padding.
        let numbers = fds.take(count).map(|fd| fd.as_raw_fd()).chain([0]);
        for (index, number) in numbers.enumerate() {
            let place = data.cast::<RawFd>().wrapping_add(index);
            // SAFETY: there is room for 254 numbers behind the header, and there are no more.
            unsafe { place.write_unaligned(number) };
        }
        // SAFETY: only computes a size.
        let space = unsafe { libc::CMSG_SPACE(payload_bytes) };
        space as usize
    }
}

/// The result of a [`recvmsg`], besides the bytes and descriptors that it has appended.
#[derive(Debug)]
pub(crate) struct Received {
    /// The number of bytes. 0 is the end of the stream.
    pub(crate) bytes: usize,
    /// True if there was room for more bytes.
    pub(crate) short: bool,
    /// The number of descriptors that were received.
    pub(crate) fds: usize,
    /// True if control data of any kind was received: descriptors, or for example credentials that
    /// another holder of the socket has switched on.
    pub(crate) with_control: bool,
    /// True if the kernel could not install some descriptors.
    pub(crate) control_truncated: bool,
    /// True if the packet was longer than the room for it.
    pub(crate) packet_truncated: bool,
    /// The process that has sent the bytes and descriptors, if the socket is set to report that and
    /// the kernel knows it.
    pub(crate) credentials: Option<Credentials>,
}

/// Sends bytes, and descriptors with their first byte, without blocking. Returns the number of
/// bytes sent. All descriptors were sent, even if some bytes were not.
///
/// Takes at most 253 descriptors, and never without a byte: a stream would drop them silently.
pub(crate) fn sendmsg<'fd>(
    socket: BorrowedFd<'_>,
    bytes: &[IoSlice<'_>],
    fds: impl ExactSizeIterator<Item = BorrowedFd<'fd>>,
) -> io::Result<usize> {
    send(socket, bytes, fds, None)
}

/// Sends one datagram with at most 253 descriptors, without blocking, to an address or to the
/// connected peer. It may be empty.
pub(crate) fn send_datagram<'fd>(
    socket: BorrowedFd<'_>,
    payload: &[u8],
    fds: impl ExactSizeIterator<Item = BorrowedFd<'fd>>,
    receiver: Option<&UnixAddr>,
) -> io::Result<()> {
    send(socket, &[IoSlice::new(payload)], fds, receiver).map(drop)
}

#[inline]
fn send<'fd>(
    socket: BorrowedFd<'_>,
    bytes: &[IoSlice<'_>],
    fds: impl ExactSizeIterator<Item = BorrowedFd<'fd>>,
    receiver: Option<&UnixAddr>,
) -> io::Result<usize> {
    let mut control = Control::new();
    let mut message = empty_message();
    // std guarantees that IoSlice has the layout of iovec.
    message.msg_iov = bytes.as_ptr().cast_mut().cast();
    message.msg_iovlen = bytes.len() as _;
    if let Some(receiver) = receiver {
        message.msg_name = receiver.as_ptr().cast_mut().cast();
        message.msg_namelen = receiver.len();
    }
    if fds.len() > 0 {
        message.msg_controllen = control.write_fds(fds) as _;
        message.msg_control = (&raw mut control).cast();
    }
    // SAFETY: the message points to `bytes`, `control` and `receiver`, valid for the lengths it
    // names until the call returns.
    let sent = unsafe {
        libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
    };
    Ok(Errno::result(sent)? as usize)
}

/// Receives at most `max_bytes` into the spare room of `bytes`, without blocking. Every descriptor
/// that arrives is appended to `fds`, close-on-exec, even if the message was truncated.
///
/// Neither `max_bytes` nor the spare room may be zero. Otherwise the result would look like the end
/// of the stream.
pub(crate) fn recvmsg(
    socket: BorrowedFd<'_>,
    bytes: &mut BytesMut,
    max_bytes: usize,
    fds: &mut impl Extend<OwnedFd>,
) -> io::Result<Received> {
    receive(socket, bytes, max_bytes, fds, None)
}

/// Receives a datagram in the same way. Returns the sender's address too, unless the sender has
/// none.
pub(crate) fn recv_datagram(
    socket: BorrowedFd<'_>,
    payload: &mut BytesMut,
    fds: &mut impl Extend<OwnedFd>,
) -> io::Result<(Received, Option<SocketAddr>)> {
    let mut sender = Name::new();
    let received = receive(socket, payload, usize::MAX, fds, Some(&mut sender))?;
    Ok((received, sender.to_addr()))
}

#[inline]
fn receive(
    socket: BorrowedFd<'_>,
    bytes: &mut BytesMut,
    max_bytes: usize,
    fds: &mut impl Extend<OwnedFd>,
    mut sender: Option<&mut Name>,
) -> io::Result<Received> {
    // Point the call to the spare room, to the control data, and to the sender's address.
    let mut control = Control::new();
    let room = bytes.spare_capacity_mut();
    debug_assert!(!room.is_empty() && max_bytes > 0);
    let mut place =
        libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: room.len().min(max_bytes) };
    let mut message = empty_message();
    message.msg_iov = &raw mut place;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = CONTROL_BYTES as _;
    if let Some(sender) = &mut sender {
        message.msg_name = sender.bytes.as_mut_ptr().cast();
        message.msg_namelen = sender.bytes.len() as _;
    }
    let flags = libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT;
    // SAFETY: the message points to the spare room of `bytes`, to `control` and to `sender`,
    // writable for the lengths it names.
    let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) };
    let received = Errno::result(received)? as usize;
    if let Some(sender) = sender {
        sender.length = message.msg_namelen as usize;
    }
    // First take ownership of the descriptors, even if the message was truncated.
    let with_control = message.msg_controllen > 0;
    let (fds, credentials) = if with_control { take_control(&message, fds) } else { (0, None) };
    // SAFETY: the kernel has written that many bytes to the spare room, in which they fit:
    // MSG_TRUNC was not asked for.
    unsafe { bytes.advance_mut(received) };
    Ok(Received {
        bytes: received,
        short: received < place.iov_len,
        fds,
        with_control,
        control_truncated: message.msg_flags & libc::MSG_CTRUNC != 0,
        packet_truncated: message.msg_flags & libc::MSG_TRUNC != 0,
        credentials,
    })
}

/// Takes ownership of every descriptor in the control data of a received message. Returns the
/// number of descriptors that the peer has sent, and the credentials.
#[allow(clippy::unnecessary_cast, reason = "`cmsg_len` is narrower on musl")]
fn take_control(
    message: &libc::msghdr,
    fds: &mut impl Extend<OwnedFd>,
) -> (usize, Option<Credentials>) {
    let (mut count, mut sender, mut pidfd) = (0, None, None);
    // SAFETY: the kernel has set `msg_controllen` to what it wrote to `msg_control`.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(message) };
    while !header.is_null() {
        // SAFETY: not null, so it points to a whole header in the control data, which is aligned
        // for it.
        let libc::cmsghdr { cmsg_len, cmsg_level, cmsg_type } = unsafe { header.read() };
        // SAFETY: `header` points to a header in the control data.
        let data = unsafe { libc::CMSG_DATA(header) };
        let payload_bytes = cmsg_len as usize - (data as usize - header as usize);
        match (cmsg_level, cmsg_type) {
            (libc::SOL_SOCKET, libc::SCM_RIGHTS | SCM_PIDFD) => {
                for index in 0..payload_bytes / size_of::<RawFd>() {
                    // SAFETY: `cmsg_len` covers this number. The place need not be aligned.
                    let raw = unsafe { data.cast::<RawFd>().wrapping_add(index).read_unaligned() };
                    // SCM_PIDFD holds a negative error number if the kernel could not make a pidfd.
                    if raw >= 0 {
                        // SAFETY: the kernel has just installed it in this process, for this
                        // message.
                        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
                        if cmsg_type == libc::SCM_RIGHTS {
                            count += 1;
                            fds.extend([fd]);
                        } else {
                            pidfd = Some(fd);
                        }
                    }
                }
            }
            (libc::SOL_SOCKET, libc::SCM_CREDENTIALS)
                if payload_bytes >= size_of::<libc::ucred>() =>
            {
                // SAFETY: `cmsg_len` covers the value. The place need not be aligned.
                sender = Some(unsafe { data.cast::<libc::ucred>().read_unaligned() });
            }
            _ => {}
        }
        // SAFETY: `header` is one of the message's headers; the macro checks the bounds.
        header = unsafe { libc::CMSG_NXTHDR(message, header) };
    }
    let credentials = sender.and_then(|sender| from_kernel(sender, pidfd));
    (count, credentials)
}

/// Returns a message header without any pointers.
fn empty_message() -> libc::msghdr {
    // `msghdr` has private padding on some C libraries, so it cannot be written as a literal.
    // SAFETY: all zero is a valid value: null pointers, zero lengths.
    unsafe { mem::zeroed() }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::fd::AsFd, os::unix::net::UnixStream};

    use super::*;

    #[test]
    fn control_holds_253_descriptors() {
        // SAFETY: only computes a size.
        let space = unsafe { libc::CMSG_SPACE((SCM_MAX_FD * size_of::<RawFd>()) as libc::c_uint) };
        assert!(space as usize <= CONTROL_BYTES);
        assert_eq!(mem::align_of::<Control>() % mem::align_of::<libc::cmsghdr>(), 0);
    }

    #[test]
    fn control_data_has_no_bytes_that_were_not_written() {
        let null = File::open("/dev/null").unwrap();
        for count in [1, 2, 3, SCM_MAX_FD - 1, SCM_MAX_FD] {
            let mut control = Control { bytes: [MaybeUninit::new(0xAA); CONTROL_BYTES] };
            let length = control.write_fds(std::iter::repeat_n(null.as_fd(), count));
            // SAFETY: every byte was written above.
            let bytes: [u8; CONTROL_BYTES] = unsafe { mem::transmute(control) };
            let fds = size_of::<libc::cmsghdr>() + count * size_of::<RawFd>();
            assert!(
                fds <= length && bytes[fds..length].iter().all(|&byte| byte == 0),
                "{count} descriptors"
            );
        }
    }

    #[test]
    fn no_more_descriptors_are_written_than_there_is_room_for() {
        /// Yields more descriptors than it has promised.
        struct Liar<I>(I);
        impl<I: Iterator> Iterator for Liar<I> {
            type Item = I::Item;
            fn next(&mut self) -> Option<I::Item> {
                self.0.next()
            }
        }
        impl<I: Iterator> ExactSizeIterator for Liar<I> {
            fn len(&self) -> usize {
                1
            }
        }
        let null = File::open("/dev/null").unwrap();
        let fds = |count| std::iter::repeat_n(null.as_fd(), count);
        let mut control = Control::new();
        assert_eq!(control.write_fds(Liar(fds(1000))), control.write_fds(fds(1)));
        let too_many =
            std::panic::AssertUnwindSafe(|| Control::new().write_fds(fds(SCM_MAX_FD + 1)));
        assert!(std::panic::catch_unwind(too_many).is_err());
    }

    #[test]
    fn descriptors_arrive_in_order_and_close_on_exec() -> io::Result<()> {
        let (a, b) = UnixStream::pair()?;
        let files =
            (0..SCM_MAX_FD).map(|_| File::open("/dev/null")).collect::<io::Result<Vec<_>>>()?;
        let pipe = io::pipe()?.0;
        let fds = files[1..].iter().map(AsFd::as_fd).chain([pipe.as_fd()]).collect::<Vec<_>>();
        assert_eq!(sendmsg(a.as_fd(), &[IoSlice::new(b"hi")], fds.into_iter())?, 2);

        let mut bytes = BytesMut::with_capacity(16);
        let mut fds = Vec::new();
        let received = recvmsg(b.as_fd(), &mut bytes, usize::MAX, &mut fds)?;
        assert_eq!(
            (received.bytes, received.control_truncated, &bytes[..]),
            (2, false, &b"hi"[..])
        );
        assert_eq!(fds.len(), SCM_MAX_FD);
        assert!(
            nix::sys::stat::fstat(&fds[252])
                .is_ok_and(|stat| stat.st_mode & libc::S_IFMT == libc::S_IFIFO)
        );
        let flags = nix::fcntl::fcntl(&fds[0], nix::fcntl::FcntlArg::F_GETFD)?;
        assert_eq!(flags, libc::FD_CLOEXEC);
        Ok(())
    }
}
