// SPDX-License-Identifier: MIT
pragma solidity ^0.8.30;

/// @title Reads and applies packed reputation updates.
/// @notice Reputations lie 32 to a storage word; lane i of word w belongs to member 32 w + i, lane 0 in the lowest byte.
/// An update of one word is `uint24 word ‖ uint32 mask ‖ one byte per set bit of the mask, highest lane first`, all
/// big-endian: 8 bytes for one member, 39 for 32. Only lanes in the mask are touched, so that a member who registers while
/// signatures are being collected keeps its reputation.
library ReputationUpdates {
    uint256 internal constant HEADER_BYTES = 7;
    uint256 private constant ALL_LANES = 0xffffffff;

    /// @notice The header at `offset`: the word's index, its mask, and where the next update starts.
    /// `next` is zero if the header or its values run past the end, or the mask is empty.
    function read(bytes calldata updates, uint256 offset)
        internal
        pure
        returns (uint256 word, uint256 mask, uint256 next)
    {
        if (offset + HEADER_BYTES > updates.length) return (0, 0, 0);
        uint256 header = uint56(bytes7(updates[offset:offset + HEADER_BYTES]));
        word = header >> 32;
        mask = header & ALL_LANES;
        next = offset + HEADER_BYTES + countBits(mask);
        if (mask == 0 || next > updates.length) next = 0;
    }

    /// @notice `current` with the lanes of `mask` replaced by the bytes that end at `end`, and which lanes became zero.
    function merge(uint256 current, bytes calldata updates, uint256 end, uint256 mask)
        internal
        pure
        returns (uint256 merged, uint256 zeroed)
    {
        if (mask == ALL_LANES) {
            merged = uint256(bytes32(updates[end - 32:end]));
            if (!hasZeroByte(merged)) return (merged, 0);
        }
        merged = current;
        unchecked {
            // `read` checked that the values are there; the loop walks the set bits only, last byte first.
            while (mask != 0) {
                uint256 bit = mask & (~mask + 1);
                uint256 value = uint8(updates[--end]);
                if (value == 0) zeroed |= bit;
                uint256 shift = indexOf(bit) << 3;
                merged = (merged & ~(uint256(0xff) << shift)) | (value << shift);
                mask ^= bit;
            }
        }
    }

    /// @notice Whether every lane of `mask` in `word` belongs to one of `total` members.
    function within(uint256 word, uint256 mask, uint256 total) internal pure returns (bool) {
        uint256 first = word * 32;
        return total > first && (total - first >= 32 || mask >> (total - first) == 0);
    }

    /// @notice The position of the only set bit of `bit`, below 32.
    function indexOf(uint256 bit) internal pure returns (uint256 lane) {
        unchecked {
            if (bit & 0xffff0000 != 0) lane += 16;
            if (bit & 0xff00ff00 != 0) lane += 8;
            if (bit & 0xf0f0f0f0 != 0) lane += 4;
            if (bit & 0xcccccccc != 0) lane += 2;
            if (bit & 0xaaaaaaaa != 0) lane += 1;
        }
    }

    function countBits(uint256 mask) internal pure returns (uint256) {
        unchecked {
            mask = mask - ((mask >> 1) & 0x55555555);
            mask = (mask & 0x33333333) + ((mask >> 2) & 0x33333333);
            mask = (mask + (mask >> 4)) & 0x0f0f0f0f;
            return ((mask * 0x01010101) & ALL_LANES) >> 24;
        }
    }

    function hasZeroByte(uint256 word) private pure returns (bool) {
        unchecked {
            uint256 low = type(uint256).max / 0xff; // 0x0101…01
            return ((word - low) & ~word & (low << 7)) != 0;
        }
    }
}
