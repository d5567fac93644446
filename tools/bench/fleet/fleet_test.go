package main

import (
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	bspb "google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// brokenServer takes one piece of the first upload, and refuses the rest.
type brokenServer struct {
	bspb.UnimplementedByteStreamServer
	committed int64 // what it says when it is asked
	complete  bool
	offsets   []int64 // at which writes began
}

func (s *brokenServer) Write(stream bspb.ByteStream_WriteServer) error {
	size := int64(0)
	for {
		request, err := stream.Recv()
		if err == io.EOF {
			return stream.SendAndClose(&bspb.WriteResponse{CommittedSize: size})
		}
		if err != nil {
			return err
		}
		if request.ResourceName != "" {
			s.offsets = append(s.offsets, request.WriteOffset)
		}
		if len(s.offsets) == 1 {
			return status.Error(codes.Unavailable, "broken")
		}
		size = request.WriteOffset + int64(len(request.Data))
	}
}

func (s *brokenServer) QueryWriteStatus(
	context.Context, *bspb.QueryWriteStatusRequest,
) (*bspb.QueryWriteStatusResponse, error) {
	if s.committed < 0 {
		return nil, status.Error(codes.NotFound, "no such upload")
	}
	return &bspb.QueryWriteStatusResponse{CommittedSize: s.committed, Complete: s.complete}, nil
}

// uploadOneBlob runs one client with one blob of three pieces against the server, and returns what it counted.
func uploadOneBlob(t *testing.T, server *brokenServer) *tally {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := grpc.NewServer()
	bspb.RegisterByteStreamServer(served, server)
	go served.Serve(listener)
	defer served.Stop()
	o := options{
		grpc: listener.Addr().String(), how: "write", conns: 1, streams: 1, files: 1, size: 3 * pieceBytes,
		retries: 2, deadline: 10 * time.Second,
	}
	counted := newTally()
	c, err := newClient(o, 0, counted)
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	c.run(context.Background())
	return counted
}

func TestAFailedUploadGoesOnWhereTheServerStands(t *testing.T) {
	for name, one := range map[string]struct {
		server  brokenServer
		offsets []int64
	}{
		"after the first piece": {brokenServer{committed: pieceBytes}, []int64{0, pieceBytes}},
		"from the beginning":    {brokenServer{committed: -1}, []int64{0, 0}},
		"it is complete":        {brokenServer{committed: 3 * pieceBytes, complete: true}, []int64{0}},
	} {
		t.Run(name, func(t *testing.T) {
			counted := uploadOneBlob(t, &one.server)
			if counted.done.Load() != 1 || counted.failed.Load() != 0 || counted.queries.Load() != 1 {
				t.Errorf("done %d, failed %d, queries %d", counted.done.Load(), counted.failed.Load(), counted.queries.Load())
			}
			if len(one.server.offsets) != len(one.offsets) {
				t.Fatalf("writes began at %v, want %v", one.server.offsets, one.offsets)
			}
			for n, offset := range one.offsets {
				if one.server.offsets[n] != offset {
					t.Errorf("writes began at %v, want %v", one.server.offsets, one.offsets)
				}
			}
		})
	}
}

func TestEveryBlobIsPlannedOnceWhateverTheKind(t *testing.T) {
	for _, how := range []string{"write", "batch", "http", "read", "mixed"} {
		o := options{how: how, files: 230, seed: 7}
		seen := map[int]int{}
		for _, one := range o.plan(0) {
			for n := one.first; n < one.first+one.count; n++ {
				seen[n]++
			}
		}
		if len(seen) != 230 {
			t.Errorf("%s: %d of 230 blobs", how, len(seen))
		}
		for n, times := range seen {
			if times != 1 {
				t.Errorf("%s: blob %d is there %d times", how, n, times)
			}
		}
	}
}

func TestPercentilesAreByNearestRank(t *testing.T) {
	l := &latencies{}
	for n := 100; n > 0; n-- {
		l.add(time.Duration(n) * time.Millisecond)
	}
	if s := l.summarise(); s.P50 != 50 || s.P99 != 99 || s.Max != 100 {
		t.Error(s)
	}
	if s := (&latencies{}).summarise(); s != (summary{}) {
		t.Error(s)
	}
}

func TestPausesGrowToFiveSeconds(t *testing.T) {
	ended, end := context.WithCancel(context.Background())
	end()
	pause := newBackoff()
	for range 10 {
		if pause.wait(ended) {
			t.Fatal("it waited for a time that is up")
		}
	}
	if pause.next != longestPause {
		t.Error(pause.next)
	}
}

func TestCausesOfFailuresAreCounted(t *testing.T) {
	counted := newTally()
	counted.note(status.Error(codes.Unavailable, "gone"))
	counted.note(context.DeadlineExceeded)
	counted.note(errors.New("other bytes"))
	want := map[string]int64{"Unavailable": 1, "DeadlineExceeded": 1, "Unknown": 1}
	for cause, times := range want {
		if counted.causes[cause] != times {
			t.Error(counted.causes)
		}
	}
}
