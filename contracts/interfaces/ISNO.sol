// SPDX-License-Identifier: MIT
pragma solidity ^0.8.30;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";

/// @title The token of the network: fixed genesis, an emission that is a pure function of time, and one minter.
interface ISNO is IERC20 {
    /// @notice An amount minted at genesis to one account.
    struct Allocation {
        address account;
        uint256 amount;
    }

    /// @notice How new tokens come into being: `perPeriod` wei every `period` seconds, multiplied by
    /// `keepBps` / 10,000 after each `decayAfter` seconds, never below `tailPerPeriod`.
    struct Schedule {
        uint128 perPeriod;
        uint128 tailPerPeriod;
        uint32 period;
        uint32 decayAfter;
        uint16 keepBps;
    }

    /// @dev `caller` is not the contract that executes rounds.
    error OnlyRounds(address caller);
    /// @dev `wanted` would bring the minted total past what the schedule allows now.
    error MintPastSchedule(uint256 wanted, uint256 allowed);
    /// @dev A schedule whose period, decay or rates make no sense.
    error BadSchedule();

    /// @notice The only account that mints: the Rounds contract, fixed at construction.
    function rounds() external view returns (address);

    /// @notice Total wei minted since genesis; burning does not lower it.
    function minted() external view returns (uint256);

    /// @notice The most that may have been minted at time `t` (seconds since 1970) beyond the genesis. Pure in `t`.
    function mintable(uint256 t) external view returns (uint256);

    /// @notice Mints `amount` wei to `to`. Reverts with MintPastSchedule beyond `mintable(now)`.
    function mint(address to, uint256 amount) external;

    /// @notice Destroys `amount` wei of the caller.
    function burn(uint256 amount) external;
}
